"""Measurements that the project's claims rest on: one module each, one result file each, and the targets beside them."""
