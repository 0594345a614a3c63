"""What a finished run is handed on as: a sky-partitioned catalogue (HATS), dense stamps, a summary of focal planes."""

from batchproc.finish.finishing import PRODUCTS, Product, finish, plan

__all__ = ["PRODUCTS", "Product", "finish", "plan"]
