"""What a model's files say before anything is loaded: headers, kinds, layouts, folders.

`header` reads one safetensors file's header; `foreign` names what is no model of the families;
`single` says what a whole model in one file is; `layout` lists the tensors that a configuration
asks for; `folder` compares a diffusers folder with itself. None of it imports torch.
"""
