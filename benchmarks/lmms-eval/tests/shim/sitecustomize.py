"""For tests only: torchvision's wheels are made for CUDA; beside a CPU torch they import once two operators exist."""

import importlib.abc
import sys


class _Operators(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None:
                torch._mmkv_operators = torch.library.Library("torchvision", "DEF")  # lives as long as the process
                for operator in ("nms", "qnms"):
                    torch._mmkv_operators.define(
                        f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                    )


sys.meta_path.insert(0, _Operators())
