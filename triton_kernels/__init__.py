"""The ops as Triton kernels: `<op>.py` holds its kernels, their launchers, and ends in two tables.

`OPERATORS`: the operators of the op (finetune/ops/<op>.py) by name, called with the native operators' arguments.
`typical(dtype)`: calls of them of the sizes that models have; the tests compile ahead of time what they launch.
Any size and stride is taken: every load and store has a mask or a block that is known to be whole, every offset is 64
bits wide. Block sizes depend on sizes, dtypes and in attention on the generation of tensor cores, so a result does not
depend on the device's number of processors, nor on a tuner's mood.
"""
