"""`mmllm data lint` on a made LLaVA-Instruct-150K: seconds, rows a second and peak memory, beside a tenth of the rows.

Rows are as many, of the same three kinds and about as long as the published ones; their 81,000 images are real JPEG
files. Faults are planted, and the run fails if the command does not find exactly these. The whole command is timed,
from the shell to the table.

Run it as `python -m tests.bench.bench_lint [--rows 150000] [--profile embedded]`.
"""

import argparse
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from PIL import Image

ROWS = 150_000
IMAGES = 81_000
TEXT = (
    "the a of in on and with is are to image person people man woman table street kitchen standing sitting near "
    "holding several background scene there which can be seen as well while another appears wooden white black red "
    "creating atmosphere visible possibly suggesting activity enjoying moment safety important because various"
)
WORDS = TEXT.split()
PLANTED = {
    "missing image": 7,
    "broken image": 5,
    "empty turn": 4,
    "turn order": 3,
    "image placeholders": 6,
    "too long": 8,
    "duplicate": 9,
    "garbled text": 2,
    "malformed row": 2,
}


@dataclass(frozen=True)
class Measured:
    """One run of the command."""

    rows: int
    megabytes: float
    seconds: float
    rows_a_second: float
    peak_rss_mb: float
    """Of the command and its workers together."""
    main_rss_mb: float
    """Of the process that reads."""


def make_rows(count: int, images: list[str], rng: random.Random) -> list[dict]:
    """Rows without faults, in the shares of the published set: 37% conversations, 15% descriptions, 48% reasoning."""
    return [_row(i, rng.choice(images), rng) for i in range(count)]


def _row(i: int, image: str, rng: random.Random) -> dict:
    pairs, low, high = rng.choices([(rng.randint(3, 6), 10, 40), (1, 90, 160), (1, 130, 260)], [37, 15, 48])[0]
    turns = []
    for k in range(pairs):
        question = f"{_text(rng, 8, 18).capitalize()} {i}?"
        placed = question if k else rng.choice([f"<image>\n{question}", f"{question}\n<image>"])
        turns += [
            {"from": "human", "value": placed},
            {"from": "gpt", "value": _text(rng, low, high).capitalize() + "."},
        ]
    return {"id": image.removesuffix(".jpg"), "image": image, "conversations": turns}


def _text(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def plant(rows: list[dict], folder: Path, rng: random.Random) -> None:
    """Give some rows one fault each; no row has two."""
    chosen = rng.sample(range(1, len(rows)), sum(PLANTED.values()))
    for fault, count in PLANTED.items():
        for n in range(count):
            row = rows[at := chosen.pop()]
            turns = row["conversations"]
            if fault == "missing image":
                row["image"] = f"absent-{n}.jpg"
            elif fault == "broken image":
                row["image"] = f"broken-{n}.jpg"
                (folder / row["image"]).write_bytes(_jpeg(n)[:-200])
            elif fault == "empty turn":
                turns[-1]["value"] = " \n"
                turns += [{"from": "human", "value": "And now?"}, {"from": "gpt", "value": "Something."}]
            elif fault == "turn order":
                turns.append({"from": "gpt", "value": "Once more."})
            elif fault == "image placeholders":
                turns[0]["value"] = turns[0]["value"].replace("<image>", "")
            elif fault == "too long":
                turns[-1]["value"] = _text(rng, 9000, 9001)
            elif fault == "duplicate":
                row.clear()
                row.update(json.loads(json.dumps(rows[at - 1])) if at - 1 not in chosen else rows[0])
            elif fault == "garbled text":
                turns[-1]["value"] += " cafÃ©"
            else:
                row["conversations"] = "none"


def _jpeg(seed: int) -> bytes:
    image = Image.effect_noise((64, 48), 20 + seed % 50).convert("RGB")
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=60)
    return stream.getvalue()


def measure(file: Path, rows: int, profile: str) -> tuple[Measured, dict[str, int]]:
    """Run the command and read its table."""
    command = [sys.executable, "-m", "cluster.cli", "data", "lint", str(file), "--images", str(file.parent / "images")]
    started = time.perf_counter()
    environment = os.environ | {"COLUMNS": "160"}
    process = subprocess.Popen([*command, "--profile", profile], stdout=subprocess.PIPE, text=True, env=environment)
    watched = psutil.Process(process.pid)
    peak = main_peak = 0
    while process.poll() is None:
        try:
            main = watched.memory_info().rss
            peak = max(peak, main + sum(child.memory_info().rss for child in watched.children(recursive=True)))
            main_peak = max(main_peak, main)
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.1)
    seconds = time.perf_counter() - started
    output = process.stdout.read() if process.stdout else ""
    print(output)
    if process.returncode != 1:
        raise SystemExit(f"the command ended with exit code {process.returncode}, and 1 was expected")
    counts = re.findall(r"^  ([a-zA-Z][a-zA-Z -]*?) +(\d+) +row", output, re.MULTILINE)
    found = {kind: int(count) for kind, count in counts}
    measured = Measured(rows, file.stat().st_size / 1e6, seconds, rows / seconds, peak / 1e6, main_peak / 1e6)
    return measured, found


def main() -> None:
    """Make the files, run the command on a tenth and on all, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--profile", default="embedded")
    arguments = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as place:
        for share in (10, 1):
            rng = random.Random(share)
            folder = Path(place) / str(share)
            (folder / "images").mkdir(parents=True)
            names = [f"{i:012d}.jpg" for i in range(IMAGES // share)]
            pictures = [_jpeg(seed) for seed in range(50)]
            for i, name in enumerate(names):
                (folder / "images" / name).write_bytes(pictures[i % len(pictures)])
            rows = make_rows(arguments.rows // share, names, rng)
            plant(rows, folder / "images", rng)
            file = folder / "instruct.json"
            file.write_text(json.dumps(rows), encoding="utf-8")
            measured, found = measure(file, len(rows), arguments.profile)
            if found != PLANTED:
                raise SystemExit(f"planted {PLANTED}, found {found}")
            runs.append(measured)
    small, large = runs
    report = {
        "profile": arguments.profile,
        "runs": [asdict(run) for run in runs],
        "peak_rss_ratio_of_10x_rows": large.peak_rss_mb / small.peak_rss_mb,
        "planted_faults_found": sum(PLANTED.values()),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
