"""Which training a checkpoint belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from netdeconv import ConfigError
from netdeconv.lab.checkpoint import difference

__all__ = ["Signature", "check_checkpoint"]

_OPTIONS = {"network": "--network", "width": "--width", "norm": "--norm"}


class Signature(Callback):
    """Writes into every checkpoint what it is of, and how many steps its training has.

    Args:
        about: ``network``, ``width``, ``norm`` and ``classes``.
        settings: all of them, as YAML, so that a checkpoint can be used without its folder.
    """

    def __init__(self, about: Mapping[str, Any], settings: str) -> None:
        self.about = dict(about)
        self.settings = settings
        self.steps: float | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"about": self.about, "steps": self.steps, "settings": self.settings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = state_dict["steps"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = float(trainer.estimated_stepping_batches)
        if self.steps not in (None, steps):
            raise ConfigError(
                f"the checkpoint is of a training of {self.steps:g} optimizer steps, this one has {steps:g}, so its "
                "learning rates would be others. Go on with as many processes and the same data, batch size and epochs"
            )
        self.steps = steps


def check_checkpoint(path: Path, content: Any, module: LightningModule, about: Mapping[str, Any]) -> int:
    """Refuse a checkpoint that the module cannot load.

    Args:
        path: the file, for the message.
        content: what is in it.
        module: to be loaded.
        about: what the module is, see :class:`Signature`.

    Returns:
        Optimizer steps that it has behind it.

    Raises:
        ConfigError: of another kind, or of another network.
    """
    state = content.get("state_dict") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or "loops" not in content:
        raise ConfigError(f"{path}: expected a checkpoint of netdeconv fit, got a file with something else in it")
    saved = content.get("callbacks", {}).get(Signature.__qualname__, {}).get("about", {})
    if saved.get("classes", about["classes"]) != about["classes"]:
        raise ConfigError(f"{path}: is of {saved['classes']} classes, the data have {about['classes']}. Check --data")
    for name, option in _OPTIONS.items():
        if name in saved and saved[name] != about[name]:
            raise ConfigError(f"{path}: is of another network: {name} {saved[name]}. Try {option} {saved[name]}")
    if found := difference(module.state_dict(), state):
        raise ConfigError(f"{path}: is of another network: {found}. Check --whitening and the other settings")
    return int(content["global_step"])
