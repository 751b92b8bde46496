"""DeepSpeed training of the diffusion backbones; start reading at trainer/train.py."""
