"""`python -m rlv2v.translate RUN IN OUT.mp4`: translate videos of any length with a trained run, in constant memory.

The generator runs frame by frame with its recurrent state carried along, so that chunks give what one pass would. A
frame is scaled so that its short side is that of the training crops, padded by replication to what the
network needs, cropped and scaled back. The output has the frames, times, size, sound, subtitles, chapters and tags of
the input. See `rlv2v.data.containers` for what each kind of file holds, `docs/translate.md` for folders of videos.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import av
import tyro

from rlv2v.checkpoint.export import load_translator
from rlv2v.cli import Device, RunFolder, run_command
from rlv2v.data.batch import Pair, find_pairs
from rlv2v.data.live import is_pipe
from rlv2v.data.y4m import is_stdout
from rlv2v.errors import UserError, first_line, get_logger, one_line, several
from rlv2v.runtime.device import set_threads
from rlv2v.runtime.distributed import World, connect
from rlv2v.runtime.interrupt import Interrupt, Stop, raised
from rlv2v.translate_file import Settings, check_paths, choose_encoding, translate_file
from rlv2v.translate_resume import is_stopped, is_there, reason_against

log = get_logger(__name__)


@dataclass(frozen=True)
class Args(Settings):
    """Translate a video, a folder of frames or many videos with a trained run, whose model is read from its folder."""

    run: RunFolder
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN")]
    """Video file that PyAV reads, a folder of numbered images, or many videos: a folder of them at any depth, or
    @list.txt, a text file with a path a line. - or a named pipe: y4m or what else can be read once."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Video to write (.mp4, .mov, .mkv, .webm, .gif), in a folder that exists, or images (NEW_FOLDER/%05d.png, .jpg,
    .webp). It appears when all frames are done. Of many videos: a folder, made if need be. -: y4m to stdout, each
    frame as soon as it is done."""
    direction: Literal["x2y", "y2x"] = "x2y"
    """x2y: source domain to target domain; y2x: back."""
    newest: bool = False
    """Use the newest checkpoint's model instead of the best one by the criterion."""
    suffix: Literal[".mp4", ".mov", ".mkv", ".webm", ".gif"] = ".mp4"
    """What many videos are written as."""
    skip_existing: bool = False
    """Of many videos, translate only those whose result is not there yet."""
    device: Device = "auto"
    threads: int = 1
    """CPU threads of the network; 0: as many as torch finds. Reading and writing have one each besides."""


class Plan(NamedTuple):
    """Hold what is to be done."""

    pairs: list[Pair]
    """Sources and outputs, without those that are there already."""
    codec: str
    many: bool
    """Whether the user named several videos: the failure of one does not end the others."""
    num_skipped: int = 0


def check_args(args: Args) -> Plan:
    """Return what is to be done, before any work; raise UserError for what cannot be done or would lose a file."""
    skip = args.skip_existing or args.resume
    if skip and args.overwrite:
        raise UserError(f"{'--resume' if args.resume else '--skip-existing'} and --overwrite: choose one of them")
    pairs = None if args.is_live(args.source) else find_pairs(args.source, args.out, args.suffix)
    if pairs is None:
        codec = choose_encoding(args, args.out)
        if skip and not is_stdout(args.out) and is_there(args.out):
            return Plan([], codec, many=False, num_skipped=1)
        check_paths(args.source, args.out, args)
        return Plan([Pair(args.source, args.out)], codec, many=False)
    codec = choose_encoding(args, args.out / f"any{args.suffix}")
    if args.resume and (reason := reason_against(pairs[0].source, pairs[0].out, None)):
        raise UserError(f"--resume: {reason}; give --skip-existing")
    existing = [str(pair.out) for pair in pairs if is_there(pair.out)]
    if existing and not (skip or args.overwrite):
        raise UserError(f"{args.out}: exists already: {several(existing)}; give --skip-existing or --overwrite")
    stopped = [str(pair.out) for pair in pairs if is_stopped(pair.out)]
    if stopped and not (args.resume or args.overwrite):
        raise UserError(f"{args.out}: was stopped: {several(stopped)}; --resume goes on, --overwrite starts over")
    todo = [pair for pair in pairs if not (skip and is_there(pair.out))]
    return Plan(todo, codec, many=True, num_skipped=len(pairs) - len(todo))


def main(args: Args) -> None:
    """Check everything, load the model once, then translate one video after the other.

    Of torchrun's n ranks, rank r takes videos r, r + n, ... A signal that asks to end stops the video under way, which
    `--resume` goes on with; that of a device, which has no other end, is completed.
    """
    plan = check_args(args)
    set_threads(args.threads)
    is_device = args.is_live(args.source) and not is_pipe(args.source)
    with Interrupt() if is_device else raised() as interrupted:
        world = connect(args.device)
        try:
            translate_all(args, plan, world, lambda: interrupted is not None and bool(interrupted.by))
            world.close()
        except Stop as stop:
            if not plan.many:
                raise
            flag = "--skip-existing" if args.suffix == ".gif" else "--resume"
            print(f"{one_line(args.out)}: stopped by {stop}; {flag} goes on with the rest", file=sys.stderr)
            raise SystemExit(stop.exit_code) from None
        finally:
            world.abort()


def translate_all(args: Args, plan: Plan, world: World, is_stopping: Callable[[], bool]) -> None:
    """Translate this rank's share of the videos, and say at the end what became of all of them.

    Raises:
        UserError: a video could not be translated.
    """
    failures: list[str] = []
    if plan.pairs:
        g, config = load_translator(args.run, args.direction, device=world.device, newest=args.newest)
    for source, out in plan.pairs[world.rank :: world.size]:
        try:
            if plan.many:
                out.parent.mkdir(parents=True, exist_ok=True)
            line = translate_file(g, config, source, out, args, plan.codec, is_stopping)
            print(line, file=sys.stderr if is_stdout(out) else sys.stdout)
        except Exception as error:
            if not plan.many:
                raise
            failures.append(str(source))
            if isinstance(error, UserError):
                log.warning("%s", error)
            else:
                log.warning(
                    "%s: %s", source, first_line(error), exc_info=not isinstance(error, (OSError, av.FFmpegError))
                )
    if not plan.many:
        if plan.num_skipped:
            print(f"{args.out}: exists already, skipped")
        return
    failures = [name for names in world.gather_objects(failures) for name in names]
    counts = f"{len(plan.pairs) - len(failures)} translated, {plan.num_skipped} skipped, {len(failures)} failed"
    if failures and world.first:
        raise UserError(f"{counts}: {', '.join(failures)}")
    if failures:
        raise SystemExit(2)
    if world.first:
        print(counts)


if __name__ == "__main__":
    run_command(main, Args)
