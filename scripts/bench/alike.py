#!/usr/bin/env python3
"""Whether a run gives the same, bit for bit, with 1, 2 and 4 workers, and with its cases in another order.

    scripts/bench/alike.py [--cases 24] [--size 32] [--fast]

The network is MONAI's resnet10, its maps Grad-CAM, guided backprop, SmoothGrad and occlusion; one CPU thread each.
The order is shuffled by a table whose rows are; ids stay, so that every file can be compared.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

import yaml
from kill import cohort, start, tree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--fast", action="store_true", help="explain the model's fast copy, which each worker makes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        config = cohort(folder, options.cases, options.size)
        content = yaml.safe_load(config.read_text())
        arguments = {"spatial_dims": 3, "n_input_channels": 1, "num_classes": 2}
        content["model"] = {"factory": "net.py:trained", "arguments": arguments, "fast": options.fast}
        content["methods"] = [
            "grad-cam",
            "guided-backprop",
            {"smooth-grad": {"samples": 4}},
            {"occlusion": {"box_mm": 32}},
        ]
        (folder / "net.py").write_text(
            "import torch\nfrom monai.networks.nets import resnet10\n\n"
            "def trained(**arguments):\n    torch.manual_seed(0)\n    return resnet10(**arguments)\n"
        )
        rows = [f"{path.name.removesuffix('.nii.gz')},{path}" for path in sorted((folder / "scans").iterdir())]
        random.Random(0).shuffle(rows)
        (folder / "t.csv").write_text("\n".join(["id,scan", *rows]) + "\n")
        config.write_text(yaml.safe_dump(content))
        shuffled = folder / "shuffled.yaml"
        shuffled.write_text(yaml.safe_dump({**content, "scans": {"table": "t.csv"}}))
        ways = {"1 worker": (config, 1), "2 workers": (config, 2), "4 workers": (config, 4), "shuffled": (shuffled, 2)}
        trees = {}
        for name, (path, workers) in ways.items():
            status = start(path, folder / name.replace(" ", "-"), workers).wait()
            trees[name] = tree(folder / name.replace(" ", "-"))
            print(f"{name}: exit status {status}, {len(trees[name])} files", flush=True)
        first = trees["1 worker"]
        for name, found in trees.items():
            print(f"{name}: {'identical to 1 worker, to the byte' if found == first else 'DIFFERS'}")
        if len(first) != options.cases * 5 or any(found != first for found in trees.values()):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
