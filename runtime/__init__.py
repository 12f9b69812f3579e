"""Execution: noise, sign packing, kernels, the plan and its executors, the trainer and its checkpoints."""
