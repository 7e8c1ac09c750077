"""How replicas of each modality follow steps of load, on real Ray Serve with tiny models.

    python -m tests.bench.autoscaling [--plot autoscaling.png]

Loads images, then speech, then text. Out: JSON with every sample and a summary of each step, and a plot of load and
replicas against time. CLIP and the LM are tiny and random; Whisper is the embedded profile's own.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from tests.serve_apps.conftest import build_tiny_bundle, deploy, own_serve, recorded_speech
from tests.serve_apps.step_load import CONFIG, DEPLOYMENTS, StepLoad, of_images, of_speech, of_text


def measure(folder: Path, up_to: int) -> dict[str, Any]:
    """Run the three steps on a service of our own and tell what was seen."""
    from mmllm_core.audio import SAMPLE_RATE, decode_audio

    clip = recorded_speech()
    seconds = decode_audio(clip, 60).size / SAMPLE_RATE
    bundle = build_tiny_bundle(folder)
    with own_serve() as port:
        service = deploy(bundle, "mmllm", "/", CONFIG | {"http.port": port})
        load = StepLoad(service.base_url, service.model, service.app_name)
        with load.watched():
            for modality, callers in {
                "vision": of_images(8),
                "audio": of_speech(8, clip, seconds),
                "text": of_text(16),
            }.items():
                load.step(modality, callers, up_to=up_to, least_s=15)
        return load.trace()


def summary(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """What each step did, in numbers: the most replicas of every modality, and how long until they came and went."""
    found = []
    for step in trace["steps"]:
        name, begin = step["modality"], step["begin"]
        during = [s for s in trace["samples"] if begin <= s["seconds"] <= step["settled"]]
        most = {other: max(s["replicas"][other] for s in during) for other in DEPLOYMENTS}
        first = next(s["seconds"] for s in during if s["replicas"][name] == most[name])
        found.append(
            {
                "step": name,
                "requests": step["requests"],
                "failed": len(step["failed"]),
                "at_rest": during[0]["replicas"][name],
                "most_replicas": most,
                "most_load": max(s["load"][name] for s in during),
                "seconds_to_most": round(first - begin, 1),
                "seconds_of_load": round(step["end"] - begin, 1),
                "seconds_to_settle": round(step["settled"] - step["end"], 1),
            }
        )
    return found


def plot(trace: dict[str, Any], file: Path) -> None:
    """Load and replicas of each modality against time."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(len(DEPLOYMENTS), sharex=True, figsize=(10, 7), layout="constrained")
    seconds = [sample["seconds"] for sample in trace["samples"]]
    top = 0.5 + max(max(sample["replicas"].values()) for sample in trace["samples"])
    for row, name in zip(rows, DEPLOYMENTS, strict=True):
        row.fill_between(
            seconds, [s["load"][name] for s in trace["samples"]], color="tab:blue", alpha=0.25, step="post"
        )
        row.set_ylabel(f"{trace['units'][name]} asked for", color="tab:blue")
        row.set_ylim(bottom=0)
        row.set_title(name, loc="left")
        replicas = row.twinx()
        running = [sample["replicas"][name] for sample in trace["samples"]]
        replicas.step(seconds, running, where="post", color="tab:red", label="replicas that run")
        replicas.set_ylim(0, top)
        replicas.set_yticks(range(int(top) + 1))
        replicas.set_ylabel("replicas", color="tab:red")
    replicas.legend(loc="upper left")
    rows[-1].set_xlabel("seconds")
    figure.savefig(file, dpi=110)


def main() -> None:
    """Run, print and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, default=Path("autoscaling.png"))
    parser.add_argument("--replicas", type=int, default=3, help="to which each modality is loaded")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trace = measure(Path(folder), arguments.replicas)
    plot(trace, arguments.plot)
    steps = summary(trace)
    lost = {what: sum(step[what] for step in steps) for what in ("requests", "failed")}
    print(json.dumps(lost | {"summary": steps} | trace))


if __name__ == "__main__":
    main()
