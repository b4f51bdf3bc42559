#!/bin/bash
# What to measure on a GPU that is there for minutes: the most valuable first, each part with a limit of its own.
#
#     bash bench/gpu_session.sh OUT [SECONDS]
#
# Every bench writes its JSON into OUT after each case, so a part that is cut off keeps what it has. OUT/log has the last
# lines of each part. PYTHON: the interpreter, with torch and triton; the extension is built in place.
set -u
out=$(mkdir -p "${1:?expected a folder for the results}" && cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$out/triton-cache}
python=${PYTHON:-python3} end=$((SECONDS + ${2:-600})) work=$(mktemp -d) failed=0
trap 'rm -rf "$work"' EXIT
exec > >(tee "$out/log") 2>&1

part() { # name, most seconds, command
  local name=$1 limit=$2 left=$((end - SECONDS)) rc
  shift 2
  if ((left < 15)); then
    echo "== $name: no time left"
    return
  fi
  ((limit > left)) && limit=$left
  echo "== $name: at most $limit s"
  timeout -k 5 "$limit" "$@" 2>&1 | tail -25
  rc=${PIPESTATUS[0]}
  echo "== $name: exit code $rc, $((end - SECONDS)) s left"
  ((rc == 0)) || failed=1
}

part build 120 "$python" setup.py -q build_ext --inplace
part machine 20 "$python" -c 'import ctypes, torch, triton
print(torch.__version__, triton.__version__, torch.cuda.get_device_name(), torch.cuda.get_device_capability())
try: ctypes.CDLL("libnvcuvid.so.1"); print("NVDEC: there")
except OSError as error: print("NVDEC:", error)'
part tests 150 "$python" -m pytest -q -x -p no:cacheprovider tests/gpu
part step 150 "$python" bench/step.py --device cuda --rounds 5 --json "$out/step.json" \
  --case default:32 workstation:256 default:64:4 gpu24:256 paint:32
part synth 20 "$python" -m rlv2v.synth "$work/synth"
part train 100 "$python" -m rlv2v.train --data "$work/synth" --out "$work/run" --preset paint --augment dihedral --budget 75
part evaluate 30 "$python" -m rlv2v.evaluate "$work/run" --data "$work/synth" --split test --json "$out/evaluation.json"
part memory 60 "$python" bench/memory.py --preset workstation --card 0 --json "$out/memory.json"
part norm 60 "$python" bench/sequence_norm.py --device cuda --json "$out/sequence_norm.json"
part bilateral 60 "$python" bench/bilateral.py --device cuda --json "$out/bilateral.json"
part convlstm 120 "$python" bench/convlstm.py --device cuda --quick --json "$out/convlstm.json"
part twin 150 "$python" bench/train_step.py --device cuda --frames 8 --paper-frames --rounds 3 --json "$out/train_step.json"
exit "$failed"
