"""`natten.utils`."""
