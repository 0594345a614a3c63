"""What a finished run is handed on as: a sky-partitioned catalogue (HATS), dense stamps, a summary of focal planes."""

from batchproc.finish.finishing import PRODUCTS, finish, plan
from batchproc.finish.work import Product

__all__ = ["PRODUCTS", "Product", "finish", "plan"]
