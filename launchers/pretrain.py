"""Pretrains the hypernetwork on text: a to the hypernetwork, b to the backbone, c is predicted.

deepspeed launchers/pretrain.py                         the embedded default
deepspeed launchers/pretrain.py --config RECIPE.yaml    any recipe; any field may follow as --section.field VALUE
"""

from tagi_ds.launch import run_stage
from tagi_ds.stages import hypernetwork

if __name__ == "__main__":
    run_stage("pretrain", hypernetwork.pretrain)
