"""One way from a uri to a loaded model, for all programs.

`options`: the keys that say how; `facts`: what its files tell; `exports`: what the uri of an export
stands for; `loading`: the model itself, the only module here that needs torch.
"""
