"""Runtime acceptance: a checkpoint driven through the stock runtimes as people use them.

Nothing here computes with the weights. Every row starts the stock programs (``python -m mlx_vlm
generate``, ``mlx_vlm server``, ``mlx_lm lora`` ...) or the stock Python calls in a child process,
and judges what comes back.
"""
