"""Finetunes the hypernetwork on tasks, with labels, stored logits and stored teachers.

deepspeed launchers/finetune.py                         the embedded default
deepspeed launchers/finetune.py --config RECIPE.yaml    any recipe; any field may follow as --section.field VALUE
"""

from tagi_ds.launch import run_stage
from tagi_ds.stages import hypernetwork

if __name__ == "__main__":
    run_stage("finetune", hypernetwork.finetune)
