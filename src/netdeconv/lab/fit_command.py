"""The commands ``netdeconv fit``, ``validate``, ``test`` and ``recipes``."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netdeconv import ConfigError, ShapeError
from netdeconv.lab.saved import content_of, place
from netdeconv.lab.training.arguments import full_arguments
from netdeconv.lab.training.claim import claimed
from netdeconv.lab.training.folder import check_same_settings, find_checkpoint, note_start, write_config
from netdeconv.lab.training.options import help_text
from netdeconv.lab.training.recipes import recipes

if TYPE_CHECKING:
    from netdeconv.lab.training.command_line import Training

__all__ = ["DIVERGED", "TERMINATED", "built", "run", "run_recipes"]

DIVERGED = 1  # exit code of a training whose loss is NaN at the end
TERMINATED = 128 + signal.SIGTERM  # that of one that was asked to end

# What Lightning says of runs that go on in their folder, of short epochs, of epochs without evaluation, and of machines
# with more or fewer cores; and what torch's compiler says of itself.
_NOT_OURS = (
    r"Checkpoint directory .* exists and is not empty",
    r"The number of training batches .* is smaller than the logging interval",
    r".* could not find the monitored key in the returned metrics",
    r"The '.*' does not have many workers",
    r"Experiment logs directory .* exists",
    r"This DataLoader will create .* worker processes",
    r".torch\._prims_common\.check. is deprecated",
)

# What torch and Lightning say of settings that do not go together, and what to do then.
_OTHER_SIZE = "The images do not have the size that the network takes: try another --data.image_size or --network"
_OF_SETTINGS = {
    "Early stopping conditioned on metric|^Invalid [a-z_ ]+: ": "",
    "Output size is too small|greater than actual input size|shapes cannot be multiplied": _OTHER_SIZE,
    "[Ee]xpected more than 1 value per channel": "Batch normalisation cannot train on one image: try a "
    "--data.batch_size that leaves no single image at the end of an epoch, or another --norm",
}


def run(command: str, arguments: Sequence[str], *, quiet: bool = False) -> int:
    """Train or evaluate; the exit code: 0, ``DIVERGED``, or 143 after SIGTERM.

    Args:
        command: ``"fit"``, ``"validate"`` or ``"test"``.
        arguments: what follows it on the command line.
        quiet: in a terminal, do not say what is being waited for; nor how a training that was stopped goes on, which
            the caller does.

    Raises:
        ConfigError: a mistake of the user, or a full disk.
        KeyboardInterrupt: on Ctrl-C, where Lightning would exit with code 1.
    """
    if {"--help", "-h"} & set(arguments):
        print(help_text(command), end="")
        return 0
    words = ["--help"] if "--help-all" in arguments else full_arguments(command, arguments)
    shown = not quiet and sys.stderr.isatty() and os.environ.get("LOCAL_RANK", "0") == "0"
    _wait_for("loading Lightning", shown)

    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from netdeconv.lab.allocator import keep_freed_memory
    from netdeconv.lab.progress import quiet_lightning

    keep_freed_memory()
    with quiet_lightning(diverging=True), warnings.catch_warnings():
        for message in _NOT_OURS:
            warnings.filterwarnings("ignore", message=message)
        cli = built(command, words)
        if cli is None:
            return 0
        try:
            if command != "fit":
                return _evaluate(cli, command)
            writes = cli.trainer.is_global_zero and not cli.config.trainer.fast_dev_run
            with claimed(cli.out) if writes else contextlib.nullcontext():
                return _fit(cli, shown)
        except MisconfigurationException as error:
            raise ConfigError(str(error)) from error
        except (RuntimeError, ValueError) as error:
            if (advice := _advice(error)) is None:
                raise
            raise ConfigError(f"{str(error).rstrip('.')}. {advice}".strip()) from error
        except BrokenPipeError:
            if command == "fit":
                print(f"netdeconv fit: nobody reads the output any more. {_goes_on(cli)}", file=sys.stderr)
            raise
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise ConfigError(
                f"cannot write to {cli.out}: {error.strerror}. Make room. {_goes_on(cli)}"
            ) from error
        except SIGTERMException:
            if cli.trainer.is_global_zero and not quiet:
                print(f"netdeconv {command}: asked to end. {_goes_on(cli)}", file=sys.stderr)
            return TERMINATED
        except SystemExit:
            if not cli.trainer.interrupted:
                raise
            if not quiet:
                print(f"\n{_goes_on(cli)}", file=sys.stderr)
            raise KeyboardInterrupt from None


def run_recipes(args: argparse.Namespace) -> int:
    """List the recipes; the exit code."""
    found = recipes()
    width = max(map(len, found))
    for name, text in found.items():
        print(f"{name:<{width}}  {text}")
    return 0


def built(command: str, words: Sequence[str]) -> Training | None:
    """Data, task and trainer, not run yet; ``None`` after ``--help-all`` and ``--print_config``.

    Args:
        command: as of :func:`run`.
        words: its arguments, see :func:`netdeconv.lab.training.arguments.full_arguments`.

    Raises:
        ConfigError: a mistake of the user.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from netdeconv.lab.training.command_line import Training

    try:
        return Training(command, words)
    except SystemExit as stop:
        if stop.code:
            raise
        return None
    except MisconfigurationException as error:
        raise ConfigError(str(error)) from error


def _wait_for(what: str, shown: bool) -> None:
    """Say what takes a while."""
    if shown:
        print(f"{what} ...", file=sys.stderr, flush=True)


def _fit(cli: Training, shown: bool) -> int:
    from netdeconv.lab.training.output import diverged, ending
    from netdeconv.lab.training.signature import check_checkpoint

    checkpoint = find_checkpoint(cli.out, cli.ckpt_path, order=("last",))
    trainer, module = cli.trainer, cli.model
    parameters = sum(p.numel() for p in module.net.parameters())
    done = None
    if checkpoint is not None:
        done = check_checkpoint(checkpoint, content_of(checkpoint), module, cli.about)
    if not cli.config.trainer.fast_dev_run:
        check_same_settings(cli.out, cli.text)
        if trainer.is_global_zero:
            write_config(cli.out, cli.text)
            note_start(
                cli.out,
                seed=cli.config.seed_everything,
                checkpoint=checkpoint,
                parameters=parameters,
                processes=trainer.world_size,
            )
    if trainer.is_global_zero:
        about = f"{cli.about['network']}, norm {cli.about['norm']}, {parameters:,} parameters"
        begun = "" if checkpoint is None else f", going on from {checkpoint}"
        print(f"{cli.out}: {about}, {cli.config.data['name']}{begun}", flush=True)
        if cli.config.compile:
            print("the network is compiled in the first steps, which takes a minute or more", flush=True)
        _wait_for(f"reading the images of {cli.config.data['name']}", shown)
    trainer.fit(module, datamodule=cli.datamodule, ckpt_path=_path(checkpoint), weights_only=True)
    if trainer.is_global_zero:
        if trainer.global_step == (done or 0):
            before = "" if done is None else f"finished before, after {trainer.current_epoch} epochs; "
            print(f"{cli.out}: {before}nothing was done")
        if cli.history.rows:
            mode = cli.config.checkpoint.mode
            print(ending(trainer, cli.history.rows, monitor=cli.monitor, mode=mode, folder=cli.out))
        if cli.config.trainer.fast_dev_run:
            print("a trial of single batches is done; nothing was written")
    if (epoch := diverged(cli.history.rows)) is None:
        return 0
    if trainer.is_global_zero:
        print(
            f"netdeconv fit: the loss is NaN from epoch {epoch} on: the training diverged. "
            "Try a lower --optimizer.lr, and another --out",
            file=sys.stderr,
        )
    return DIVERGED


def _evaluate(cli: Training, command: str) -> int:
    from netdeconv.lab.training.signature import check_checkpoint

    checkpoint = find_checkpoint(cli.out, cli.ckpt_path, order=("best", "last"))
    if checkpoint is None and cli.ckpt_path is None:
        raise ConfigError(f"expected a checkpoint in {cli.out}, found none. Give --out, --ckpt_path, or run fit first")
    if checkpoint is not None:
        content = content_of(checkpoint)
        check_checkpoint(checkpoint, content, cli.model, cli.about)
        if cli.trainer.is_global_zero:  # standard output has the numbers alone
            print(f"netdeconv {command}: {checkpoint}{place(content)}", file=sys.stderr)
    evaluate: Any = getattr(cli.trainer, command)
    results = evaluate(
        cli.model, datamodule=cli.datamodule, ckpt_path=_path(checkpoint), weights_only=True, verbose=False
    )
    if cli.trainer.is_global_zero:
        for name, value in {name: value for result in results for name, value in result.items()}.items():
            print(f"{name} {value:.6g}")
    return 0


def _path(checkpoint: Path | None) -> str | None:
    return None if checkpoint is None else str(checkpoint)


def _advice(error: Exception) -> str | None:
    """What to do about an error of torch or Lightning that settings have caused; ``None`` for all others."""
    if isinstance(error, ShapeError):
        return _OTHER_SIZE
    return next((advice for pattern, advice in _OF_SETTINGS.items() if re.search(pattern, str(error))), None)


def _goes_on(cli: Training) -> str:
    kept = (cli.out / "checkpoints" / "last.ckpt").is_file()
    return (
        f"The same command goes on from {cli.out}" if kept else f"No checkpoint was saved yet in {cli.out}"
    )
