"""The deployable bundle, the Triton model repository in it, and the server of the Open Inference Protocol."""
