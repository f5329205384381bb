"""Losses under the names and arguments of other libraries, computed by mekd.functional: change the import, no more.

One module a library: mdistiller, torchdistill, timm, repdistiller, liger, modelopt, torchtune and trl. Values,
gradients and dtypes are those of the originals, but float16 and bfloat16 are computed in float32 and rounded once.
What differs is what mekd.functional says: a temperature must be above 0, a teacher that would be sent a gradient is
refused, and second derivatives too; a class that both networks rule out and an empty batch give 0, not NaN.
"""
