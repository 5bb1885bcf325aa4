"""The help of fit, validate and test: what is used most. The parser's own, of all options, is several hundred lines."""

from __future__ import annotations

from netdeconv import zoo
from netdeconv.lab.norms import NORMS
from netdeconv.lab.schedules import SCHEDULES
from netdeconv.lab.training.options import DATA_OPTIONS
from netdeconv.lab.training.recipes import recipes

__all__ = ["help_text"]

_USAGE = {
    "fit": """\
usage: netdeconv fit --config RECIPE [options]

Train a network. The same command goes on where it was stopped.

  netdeconv fit --config digits --out runs/digits
  netdeconv fit --config cifar10-20-epochs --network resnet18 --width 0.5 --norm bn --optimizer.lr 0.03
""",
    "validate": """\
usage: netdeconv validate RUN|CHECKPOINT [options]

Evaluate a trained network on the validation part of its data: the best checkpoint of a run folder, or the one named.
""",
    "test": """\
usage: netdeconv test RUN|CHECKPOINT [options]

Evaluate a trained network on the test part of its data: the best checkpoint of a run folder, or the one named.
""",
}


def help_text(command: str) -> str:
    """What ``netdeconv COMMAND --help`` prints, for ``"fit"``, ``"validate"`` and ``"test"``."""
    width = max(map(len, DATA_OPTIONS))
    data = "\n".join(f"    {name:<{width}}  {', '.join(options)}" for name, options in DATA_OPTIONS.items())
    norms = "\n".join(f"    {name:<{width}}  {norm.text}" for name, norm in NORMS.items())
    return f"""\
{_USAGE[command]}
run
  --config, -c RECIPE     a recipe by its name, or a YAML file of settings; later ones win. netdeconv recipes lists
                          {_wrapped(list(recipes()))}
  --out DIR               run folder (default: runs/DATA-NETWORK-NORM)
  --ckpt_path WHICH       checkpoint to begin with: last or best of the run folder, a path, or none
  --seed_everything N     seed (default: 0)
  --compile true          compile the network with torch.compile, which takes a minute or more at the start
  --channels_last true    store images and weights with the channels last

data
  --data NAME             data set in place of the recipe's; its options are --data.OPTION:
{data}
    root is the folder of the data sets, or else the environment variable NETDECONV_DATA

network
  --network NAME          small, a network of the zoo, or torchvision:NAME. The zoo:
                          {_wrapped(list(zoo.NETWORKS))}
  --width FACTOR          on the channels (default: 1)
  --norm NAME             normalisation (default: nd):
{norms}
  --whitening.SETTING X   of WhiteningConfig, where it differs from the norm's own, e.g. --whitening.update_every 4
  --smoothing X           label smoothing
  --aux_weight X, --aux_rate_factor X     of the auxiliary head's loss and learning rate, for segmentation

optimizer
  --optimizer NAME        of torch.optim (default: SGD); --optimizer.help NAME lists its options
  --optimizer.lr X, --optimizer.weight_decay X, --optimizer.momentum X
  --schedule.name NAME    {", ".join(SCHEDULES)}; --schedule.power, --schedule.milestones, --schedule.gamma

trainer, Lightning's
  --trainer.max_epochs N, --trainer.accelerator cpu, --trainer.devices N, --trainer.strategy ddp
  --trainer.precision bf16-mixed, --trainer.accumulate_grad_batches N, --trainer.gradient_clip_val X
  --trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=validation/loss --trainer.callbacks.patience=2
  --trainer.fast_dev_run true             try one batch of everything, write nothing

checkpoints
  --checkpoint.every_n_steps N            steps between two saves of the last one (default: 500)
  --checkpoint.monitor NAME, --checkpoint.mode max|min    what decides which one is the best

  --print_config          print all settings as YAML, and end
  --help-all              all options, of Lightning's Trainer too
"""


def _wrapped(names: list[str]) -> str:
    """Names in lines that are not too long, below one another."""
    lines = [""]
    for name in names:
        if len(lines[-1]) + len(name) > 88:
            lines.append("")
        lines[-1] += f"{name}, "
    return f"\n{' ' * 26}".join(line.rstrip() for line in lines).rstrip(",")
