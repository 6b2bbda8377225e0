"""Training scripts of three styles, each trained twice: as it is, and with gpt2fast swapped in.

    python -m gpt2fast.examples.nanogpt_style --steps 40
    python -m gpt2fast.examples.huggingface_style
    python -m gpt2fast.examples.plain_pytorch --data data/mine

They run on the source text of Python's own standard library, or on a folder of shards
(`gpt2fast prepare`), and print both loss curves, how far they are apart, and both speeds.
"""
