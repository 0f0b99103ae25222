"""What every result measured on a GPU says about its origin: device, software, commit, and the kernels' digest.

    python bench/gpu_evidence.py        # says which committed results are of other kernels than these

The digest is of the text that NVRTC compiles, so a result stays valid until a kernel or the geometry changes.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


def device_texts() -> list[Path]:
    """The files that the library embeds (cmake/embed_kernels.cmake)."""
    kernels = [path for end in ("*.cu", "*.cuh", "*args.h") for path in (ROOT / "src" / "gpu").glob(end)]
    return [ROOT / "include" / "vicus" / "geometry.h", *sorted(kernels)]


def kernel_digest() -> str:
    """SHA-256 over names and contents of the device texts."""
    digest = hashlib.sha256()
    for path in device_texts():
        text = path.read_bytes()
        digest.update(f"{path.name} {len(text)}\n".encode())
        digest.update(text)
    return digest.hexdigest()


def commit() -> str:
    """VICUS_COMMIT, or what git says; a machine that measures may have neither."""
    if named := os.environ.get("VICUS_COMMIT"):
        return named

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        except FileNotFoundError:
            return ""

    head = git("rev-parse", "HEAD") or "unknown"
    return head + (" with changes" if git("status", "--porcelain", "--", "src", "include", "python") else "")


def slug(device_name: str) -> str:
    """Folder of a device's results: "h100" for "NVIDIA H100 80GB HBM3"."""
    words = re.findall(r"[a-z0-9]+", device_name.lower())
    for word in words:
        if re.fullmatch(r"[a-z]{1,3}\d{2,4}[a-z]?", word):
            return word
    return "-".join(word for word in words if word not in ("nvidia", "geforce")) or "unknown"


def driver() -> str:
    """Version of the NVIDIA driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    except FileNotFoundError:
        found = []
    return found[0] if found else "unknown"


def provenance() -> dict[str, Any]:
    """The head of every result file. Needs PyTorch and a GPU."""
    import torch

    import vicus

    properties = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),  # noqa: UP017: Python 3.10
        "commit": commit(),
        "kernel_digest": kernel_digest(),
        "gpu": {
            "name": properties.name,
            "count": torch.cuda.device_count(),
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "driver": driver(),
        },
        "versions": {
            "vicus": vicus.info()["version"],
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "python": platform.python_version(),
        },
    }


def place(report: dict[str, Any], kind: str, out: Path | None = None) -> Path:
    """`results/<gpu>/<kind>.json`, or `out`."""
    return out or RESULTS / slug(report["gpu"]["name"]) / f"{kind}.json"


def earlier(report: dict[str, Any], kind: str, out: Path | None = None, any_kernels: bool = False) -> dict[str, Any]:
    """What an earlier run of the same kernels on the same device and software left there, or nothing."""
    path = place(report, kind, out)
    found = json.loads(path.read_text()) if path.exists() else {}
    same = all(found.get(name) == report[name] for name in ("gpu", "versions"))
    return found if same and (any_kernels or found.get("kernel_digest") == report["kernel_digest"]) else {}


def keep_peers(report: dict[str, Any], known: dict[str, Any], names: list[str]) -> None:
    """Peers of these names that were not measured now, as an earlier run on the same device and software found them:
    they are no kernels of ours. `of` says which run."""
    here = {(row["problem"], row["pass"]): row for row in report["rows"]}
    for row in known.get("rows", []):
        for name in names:
            found = row.get("peers", {}).get(name, {})
            peers = here.get((row["problem"], row["pass"]), {}).get("peers", {name: {}})
            if "seconds" in found and name not in peers:
                peers[name] = {"of": {"commit": known["commit"], "date": known["date"]}, **found}


def origins(*reports: dict[str, Any]) -> list[dict[str, str]]:
    """Commit and date of all runs whose results were put together."""
    return [run for r in reports for run in r.get("runs", [{"commit": r["commit"], "date": r["date"]}])]


def write(report: dict[str, Any], kind: str, out: Path | None = None) -> Path:
    """Writes `results/<gpu>/<kind>.json`, or `out`."""
    path = place(report, kind, out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path


def stale(results: Path = RESULTS) -> list[str]:
    """One line for each committed result whose kernels are not these."""
    now, lines = kernel_digest(), []
    for path in sorted(results.glob("*/*.json")):
        report = json.loads(path.read_text())
        then = report.get("kernel_digest")
        if then and then != now:
            where = f"{path.parent.name}/{path.name}"
            lines.append(f"{where} is of other kernels: commit {report['commit'][:12]}, {report['date'][:10]}")
    return lines


def main() -> None:
    print(f"kernels: {kernel_digest()[:16]}")
    for line in stale():
        print(f"warning: bench/results/{line}; `make gpu-test` and `make gpu-bench` renew it")


if __name__ == "__main__":
    main()
