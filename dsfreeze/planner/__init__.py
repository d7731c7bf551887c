"""Questions about many plans at once: which stage, how many devices, what fits, what it costs as a model grows. No torch.

`sweep` prices strategies over stages and world sizes, `fit` looks for what fits a budget and trains fastest, `study` does either
over many models, and `calibration` learns from a measured run what the formulas cannot know.
"""
