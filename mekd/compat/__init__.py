"""Losses under the names and arguments of other libraries, computed by mekd.functional: change the import, no more.

One module a library: mdistiller, torchdistill, timm, repdistiller and liger. Values and gradients are those of the
originals; float16 and bfloat16 inputs give a float32 loss, a temperature must be above 0, a teacher that requires
grad is refused where the original would send gradients to it, and a class or row of probability 0 gives 0, not NaN.
"""
