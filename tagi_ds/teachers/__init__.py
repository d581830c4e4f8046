"""Teachers that learned each task from instances, computed once and kept in two stores.

:mod:`parameter_store` holds a LoRA a unit (category or task), :mod:`logit_store` the teacher's distribution at every
training target; :mod:`distillation` joins both to the batches of a run.
"""
