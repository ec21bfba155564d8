"""IP-Adapters: pictures that rows refer to, in the UNet call of all rows."""
