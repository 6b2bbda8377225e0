"""A whole pre-norm transformer block in one op, fp32 on a CPU: what lies between kernels costs a small
model most of its time."""
