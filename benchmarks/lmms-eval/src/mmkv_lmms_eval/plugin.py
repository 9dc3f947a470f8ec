"""What lmms-eval finds in the entry point group `lmms_eval.models`."""

from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """The model `mmkv`, for tasks in chat form and, with `--force_simple`, in the simple form."""
    module = f"{__package__}.model"
    return ModelManifest("mmkv", simple_class_path=f"{module}.Mmkv", chat_class_path=f"{module}.MmkvChat")
