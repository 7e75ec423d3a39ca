"""Weights of eight bits and of seven in onnxruntime: accuracy, and how far outputs are from those in fp32.

Published CIFAR-10 networks as they are (the JPEG copy costs them accuracy in fp32 too), ranges from 256 training
images, all test images. What comes out depends on the CPU: without VNNI, weights of eight bits overflow.

    python benchmarks/eight_bits.py --data cifar10-jpeg --weights weights --out results/benchmarks/eight_bits.json
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

import tcp_core as tcp
from tcp_core import nets
from tcp_core.datasets import sources
from tcp_core.deploy import running
from tcp_core.study.results import environment
from tcp_core.training.batches import by_epoch

CHOICES = {"fp32": None, "8 bits": False, "7 bits": True}


def main() -> None:
    """Measure every network in every choice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of images, such as cifar10-jpeg")
    parser.add_argument("--weights", type=Path, required=True, help="folder with <network>-cifar10.safetensors")
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet56"], choices=list(nets.NETWORKS))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    source = sources.image_folder(options.data)
    batches = list(by_epoch(source.test, 500, "none", None, torch.device("cpu"))(0))
    images = next(iter(by_epoch(source.train, 256, "none", None, torch.device("cpu"))(0)))[0]
    content = environment("cpu") | {"rows": []}
    for network in options.networks:
        model = nets.build(network, num_classes=len(source.train.classes)).eval()
        nets.load_weights(model, options.weights / f"{network}-cifar10.safetensors")
        with tempfile.TemporaryDirectory() as folder:
            dense = tcp.export(model, Path(folder) / "dense.onnx", images[:2])
            exact = running.call(dense, batches[0][0])()[0]
            for choice, reduced in CHOICES.items():
                file = dense
                if choice != "fp32":
                    file = running.quantise(dense, dense.with_name("small.onnx"), images, reduce_range=reduced)
                distance = np.square(running.call(file, batches[0][0])()[0] - exact).mean() ** 0.5
                row = {"network": network, "weights": choice, "accuracy": running.accuracy(file, batches)}
                content["rows"].append(row | {"rms": float(distance), "rms_of_logits": float(exact.std())})
                print(json.dumps(content["rows"][-1]), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
