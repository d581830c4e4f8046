"""Trains the small backbone of the embedded study; with a published backbone this stage is not needed.

deepspeed launchers/backbone.py                         the embedded default
deepspeed launchers/backbone.py --config RECIPE.yaml    any recipe; any field may follow as --section.field VALUE
"""

from tagi_ds.launch import run_stage
from tagi_ds.stages import sequence

if __name__ == "__main__":
    run_stage("backbone", sequence.train_backbone)
