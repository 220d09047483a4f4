"""What the tests of the report read pages with, and files as an export and a build leave them."""

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import onnx

from lowpass.export.batch import BatchProfile
from lowpass.export.onnx.verify import VERIFICATION_FILE
from lowpass.export.tensorrt.layers import Kernel, Layers, Totals
from lowpass.export.tensorrt.plan import Manifest
from lowpass.pipeline.base.files import sha256, write_json


class Outline(HTMLParser):
    """Ids, levels of headings, and what should not be in a page that stands alone or is read aloud."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids, self.levels, self.wrong = list[str](), list[int](), list[str]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if "id" in given:
            self.ids.append(given["id"] or "")
        if re.fullmatch("h[1-6]", tag):
            self.levels.append(int(tag[1]))
        target = given.get("href") or given.get("src") or "#"
        if not target.startswith(("#", "data:")) or tag in ("script", "iframe", "object"):
            self.wrong.append(f"{tag} {target}")
        if tag == "th" and "scope" not in given:
            self.wrong.append("th without scope")
        if tag == "svg" and given.get("aria-hidden") != "true" and not given.get("aria-label"):
            self.wrong.append("svg that says nothing")
        if any(name.startswith("on") for name in given):
            self.wrong.append(f"{tag} with a handler")


def words(page: str) -> str:
    """What a reader reads, in one line."""
    body = re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(body))


def add_int8(directory: Path) -> None:
    """A file that says of itself that a layer was left out of 8 bits: the FP32 one under another name."""
    model = onnx.load(directory / "model.fp32.onnx")
    model.metadata_props.add(key="left_out", value=json.dumps(["blocks.1.mlp.fc2.MatMul"]))
    (directory / "model.int8.onnx").write_bytes(model.SerializeToString())
    known = json.loads((directory / VERIFICATION_FILE).read_text())
    entry = known["model.fp32.onnx"] | {"sha256": sha256(directory / "model.int8.onnx"), "same_top1": 99.25}
    write_json(directory / VERIFICATION_FILE, known | {"model.int8.onnx": entry | {"kept_fp32": ["blocks.0.mlp.fc1"]}})


def add_engine(directory: Path) -> None:
    """An engine as `build` leaves it, of a kernel a block."""
    totals = {"kernels": 1, "macs": 1, "bytes_read": 1, "bytes_written": 1}
    layers = Layers(
        batch="1",
        kernels=(
            Kernel(
                name="k", kind="gemm", block=0, inputs=(), constants=(), outputs=(), nodes=(), macs=1, bytes_read=1,
                bytes_written=1,
            ),
        ),
        whole=Totals(block=None, **(totals | {"kernels": 47})),
        blocks=tuple(Totals(block=index, **totals) for index in range(3)),
    )  # fmt: skip
    plan = directory / "model.int8.plan"
    plan.write_bytes(b"plan")
    manifest = Manifest(
        runtime="tensorrt-rtx",
        version="1.7",
        gpu="built without a GPU",
        precision="int8",
        profile=BatchProfile.parse("1"),
        onnx="model.int8.onnx",
        onnx_sha256=sha256(directory / "model.int8.onnx"),
        plan_sha256=sha256(plan),
    )
    write_json(directory / "model.int8.plan.json", manifest.model_dump(mode="json"))
    write_json(directory / "model.int8.layers.json", [layers.model_dump(mode="json")])
