"""From a trained model to embeddings, and from embeddings to answers."""

from gcl_jax.retrieval.embedder import Embedder
from gcl_jax.retrieval.exact import top_k
from gcl_jax.retrieval.flat import nearest
from gcl_jax.retrieval.load import load
from gcl_jax.retrieval.neighbours import Neighbours
from gcl_jax.retrieval.store import Index, read_index

__all__ = ["Embedder", "Index", "Neighbours", "load", "nearest", "read_index", "top_k"]
