"""Translate a video by an exported model, without rlv2v or torch: python play_onnx.py EXPORT IN.mp4 OUT.mp4"""

import sys

import av
import numpy as np
import onnxruntime
from av.video.reformatter import Interpolation

EXACT = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
folder, source, target = sys.argv[1:]
start, step = (onnxruntime.InferenceSession(f"{folder}/{name}.onnx") for name in ("start", "step"))
about = start.get_modelmeta().custom_metadata_map
size, multiple = int(about["size"]), int(about["multiple"])


def to_model(frame: av.VideoFrame, width: int, height: int) -> np.ndarray:
    rgb = frame.reformat(width, height, "rgb24", interpolation=EXACT).to_ndarray()
    return rgb.transpose(2, 0, 1)[None].astype(np.float32) / 127.5 - 1


with av.open(source) as video, av.open(target, "w") as output:
    shown = video.streams.video[0]
    stream = output.add_stream("libx264", rate=shown.average_rate, options={"crf": "16"})
    stream.width, stream.height = (side + side % 2 for side in (shown.width, shown.height))
    session, state = start, []
    for frame in video.decode(video=0):
        sides = frame.width, frame.height
        small = (max(1, round(side * size / min(sides) / multiple)) * multiple for side in sides)
        images = {"small": to_model(frame, *small), "frame": to_model(frame, *sides)}
        values = [images[i.name] for i in session.get_inputs() if i.name in images] + state
        translated, *state = session.run(None, dict(zip([i.name for i in session.get_inputs()], values, strict=True)))
        session = step  # the start is for the first frame alone
        rgb = np.round((translated[0].transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)
        output.mux(stream.encode(av.VideoFrame.from_ndarray(rgb)))
    output.mux(stream.encode(None))
