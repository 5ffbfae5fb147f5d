"""`forward(x, weight, bias, out)`, `grad_input(dy, weight, out)` and `grad_weight(dy, x, out)` of a linear layer.

x (N, K), weight (V, K), bias (V,) or None, dy (N, V), all of one dtype. `out`, where it is given, is added to: y (N, V)
or dx (N, K) in the dtype of the inputs, dW (V, K) in that or in float32. Sums are accumulated in float32 and rounded
once. Each returns the tensor that it wrote.
"""
