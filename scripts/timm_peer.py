"""timm's Mixer in a process of its own, timed on request.

Reads a request per line (JSON), writes a reply per line: first {"prepare": a side of
suite_plan.py, "dtype": …, "threads": …}, then {"clock": its label, "times": number of
calls}. Needs PyTorch and timm, nothing of this package. Modes: "eager",
"channels-last", "compiled" (`torch.compile`), "max-autotune" (the same, every kernel
searched for).

The model is timm's own class with the tanh GELU of the published weights. A training
step is zero_grad, forward, sigmoid loss, backward, clip by global norm, fused AdamW; in
bfloat16 under autocast, with parameters in float32, as the peer's users train.
Inference in bfloat16 has its parameters in bfloat16.
"""

import functools
import importlib.util
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any


class Timm:
    """The sides that are prepared, by label."""

    def __init__(self) -> None:
        self.runs: dict[str, Callable[[], Any]] = {}
        self.device = "cpu"

    def wait(self) -> None:
        """Returns when the device is done."""
        if self.device != "cpu":
            import torch

            torch.cuda.synchronize()

    def prepare(self, side: dict[str, Any], dtype: str, threads: int) -> dict[str, Any]:
        """Builds, compiles and runs a side; returns what that cost."""
        import timm
        import torch

        on_cpu = threads > 0
        if not on_cpu and not torch.cuda.is_available():
            raise RuntimeError("torch sees no GPU")
        self.device = "cpu" if on_cpu else "cuda"
        if on_cpu:
            torch.set_num_threads(threads)
        else:
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(0)
        cpu, wall = time.process_time(), time.perf_counter()
        run = self.runs[side["label"]] = self._run_of(side, dtype == "bfloat16")
        for _ in range(1 if on_cpu else 3):
            run()
        self.wait()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        result = {"compile_cpu_s": [cpu], "compile_wall_s": [wall]}
        versions = {"torch": torch.__version__, "timm": timm.__version__}
        if not on_cpu:
            result["total_bytes"] = torch.cuda.max_memory_allocated()
        return result | {"versions": versions}

    def net_of(self, side: dict[str, Any]) -> Any:
        """Returns the module of a side, on the CPU."""
        import torch
        from timm.models.mlp_mixer import MlpMixer

        fields = side["fields"]
        return MlpMixer(
            num_classes=1000,
            img_size=side["image_size"],
            patch_size=fields["patch_size"][0],
            num_blocks=fields["num_blocks"],
            embed_dim=fields["hidden_dim"],
            mlp_ratio=tuple(
                fields[name] / fields["hidden_dim"]
                for name in ("tokens_mlp_dim", "channels_mlp_dim")
            ),
            act_layer=functools.partial(torch.nn.GELU, approximate="tanh"),
        )

    def _run_of(self, side: dict[str, Any], half: bool) -> Callable[[], Any]:
        import torch

        size, batch = side["image_size"], side["batch"]
        net = self.net_of(side).to(self.device)
        image = torch.rand(batch, 3, size, size, device=self.device) * 2 - 1
        mode = side["options"].get("mode", "eager")
        if mode == "channels-last":
            net = net.to(memory_format=torch.channels_last)
            image = image.to(memory_format=torch.channels_last)
        train = side["kind"] == "train"
        if half and not train:
            net, image = net.bfloat16(), image.bfloat16()
        optimiser = torch.optim.AdamW(
            net.parameters(), lr=1e-3, weight_decay=0.1, fused=True
        )
        called: Any = net.train(train)
        if mode in ("compiled", "max-autotune"):
            how = {"mode": "max-autotune-no-cudagraphs"} if mode != "compiled" else {}
            called = torch.compile(net, **how)
        if not train:

            def predict() -> Any:
                with torch.inference_mode():
                    return called(image)

            return predict
        label = torch.nn.functional.one_hot(torch.arange(batch) % 1000, 1000)
        label = label.float().to(self.device)
        loss_of = torch.nn.functional.binary_cross_entropy_with_logits

        def step() -> Any:
            optimiser.zero_grad(set_to_none=True)
            with torch.autocast(self.device, torch.bfloat16, enabled=half):
                logits = called(image)
            loss = loss_of(logits.float(), label, reduction="sum") / batch
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimiser.step()
            return loss

        return step

    def clock(self, label: str, times: int) -> dict[str, float]:
        """Returns CPU seconds, wall seconds and page faults per call."""
        run = self.runs[label]
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(times):
            run()
        self.wait()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        used = {"cpu_s": cpu, "wall_s": wall, "page_faults": faults}
        return {name: value / times for name, value in used.items()}


def answer(timm: Timm, request: dict[str, Any]) -> dict[str, Any]:
    """Returns the reply to a request; {"error": …} where it fails."""
    for module in ("torch", "timm"):
        if importlib.util.find_spec(module) is None:
            return {"error": f"{module} is not installed ({sys.executable})"}
    try:
        if "prepare" in request:
            return timm.prepare(
                request["prepare"], request["dtype"], request["threads"]
            )
        return timm.clock(request["clock"], request["times"])
    except Exception as error:  # the suite records it and goes on
        lines = str(error).splitlines() or [""]
        return {"error": f"{type(error).__name__}: {lines[0]}"}


def main(timm: Timm) -> None:
    """Answers until there are no more requests."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the packages print is no reply
    for line in sys.stdin:
        print(json.dumps(answer(timm, json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main(Timm())
