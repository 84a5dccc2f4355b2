"""Indices over keys on the host: which keys have the largest products with a query?"""

from typing import Any, Protocol

import numpy as np

from effattn_jax import checks


class KeyIndex(Protocol):
    """Vectors are numbered in the order in which they are added."""

    def add(self, vectors: np.ndarray) -> None:
        """vectors: [n, K] float32."""

    def search(self, queries: np.ndarray, count: int) -> np.ndarray:
        """[m, K] float32 -> [m, count], numbers of vectors, the best first; -1 where there are no more."""


class ExactIndex:
    """All products, and of equal ones the first: the answer that the others approach."""

    def __init__(self, key_dim: int):
        self.vectors = np.zeros((0, key_dim), np.float32)

    def add(self, vectors: np.ndarray) -> None:
        self.vectors = np.concatenate([self.vectors, np.asarray(vectors, np.float32)])

    def search(self, queries: np.ndarray, count: int) -> np.ndarray:
        products = np.asarray(queries, np.float32) @ self.vectors.T
        order = np.argsort(-products, axis=1, kind="stable")[:, :count]
        return np.pad(order, ((0, 0), (0, count - order.shape[1])), constant_values=-1)


class FaissIndex:
    """An index of faiss, by its factory's name, for inner products; `pip install effattn_jax[retrieval]`.

    "HNSW32,Flat" is a graph of near keys, which grows as keys come. Queries of attention are distributed unlike keys,
    so that more of the index must be searched than for queries like the keys: `search_width` vectors are kept in sight.
    """

    def __init__(self, key_dim: int, factory: str = "HNSW32,Flat", *, search_width: int = 256):
        try:
            import faiss
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("FaissIndex needs faiss: pip install effattn_jax[retrieval]") from error
        index: Any = faiss.index_factory(key_dim, factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            checks.fail("factory", repr(factory), "an index without training, such as 'HNSW32,Flat' or 'Flat'")
        if "HNSW" in factory:
            index.hnsw.efSearch = search_width
        self.index = index

    def add(self, vectors: np.ndarray) -> None:
        self.index.add(np.ascontiguousarray(vectors, np.float32))

    def search(self, queries: np.ndarray, count: int) -> np.ndarray:
        return self.index.search(np.ascontiguousarray(queries, np.float32), count)[1]
