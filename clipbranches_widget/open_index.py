"""The opened indexes of a catalog, here or on a cluster (layer 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipbranches_widget.catalog_index import CatalogIndex
from clipbranches_widget.shard_search import nearest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from clipbranches_widget.catalog import Catalog
    from clipbranches_widget.index_protocol import Index
    from clipbranches_widget.shard_search import Nearest


def index_of(catalog: Catalog) -> Index:
    """Return the indexes of a catalog, opened once: on its cluster, where it was given one."""
    client = catalog.client
    if client is None:
        return local_index_of(catalog)
    from clipbranches_widget.cluster import ClusterIndex

    return catalog.opened("cluster index", lambda: ClusterIndex(catalog, client))


def nearest_of(
    catalog: Catalog,
    query: NDArray[np.float64],
    k: int,
    *,
    only: NDArray[np.bool_] | None = None,
) -> Nearest:
    """Return the rows of a catalog nearest to a query; see `shard_search.nearest`.

    On this machine no more is opened for it than the vector indexes, which do not keep the catalog
    from being closed.
    """
    if catalog.client is None:
        return nearest(catalog, query, k, only=only)
    return index_of(catalog).search(query, k, only=only)


def local_index_of(catalog: Catalog) -> CatalogIndex:
    """Return the indexes of a catalog on this machine, opened once."""
    return catalog.opened("index", lambda: CatalogIndex(catalog))
