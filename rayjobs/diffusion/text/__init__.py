"""From texts to what the UNet is conditioned on."""
