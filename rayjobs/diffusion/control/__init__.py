"""ControlNets: what is loaded of them beside a model, and what they add to a UNet call."""
