"""Clusters of a corpus, one for each expert: TF-IDF and k-means, or k-means on the embeddings of a local model.

    OUT/0.jsonl ... OUT/{E-1}.jsonl    lines {"content": text, "id": number of its line, "file": name of its file}

LLaMA-MoE (arXiv:2406.16554 section 3.1) embeds with a sentence model, which needs a download; TF-IDF needs nothing.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoint_tools.documents import Document, documents
from ep_engine.errors import UserError
from ep_engine.output import whole_folder

_FEATURES = 1 << 16  # words kept, the most frequent


def cluster(
    corpus: Sequence[Path],
    out: Path,
    num_clusters: int,
    *,
    embed: Path | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> list[int]:
    """Share documents out over clusters.

    Args:
        corpus: files and folders of documents.
        out: folder to write.
        num_clusters: at least 1; at most as many as documents.
        embed: folder of a sentence-transformers model; None: TF-IDF.
        seed: of k-means.
        overwrite: replace `out` if it is a non-empty folder.

    Returns:
        Documents of every cluster.

    Raises:
        UserError: there are fewer documents than clusters, or the model or its library is not there.
    """
    found = list(documents(corpus))
    if not 1 <= num_clusters <= len(found):
        raise UserError(f"--clusters ({num_clusters}) must be in 1..{len(found)}, the documents; choose it there")
    label_N = _labels([document.text for document in found], num_clusters, embed, seed)
    with whole_folder(out, overwrite=overwrite) as draft:
        for number in range(num_clusters):
            lines = (_line(found[at]) for at in np.flatnonzero(label_N == number))
            (draft / f"{number}.jsonl").write_text("".join(lines), encoding="utf-8")
    return [int(size) for size in np.bincount(label_N, minlength=num_clusters)]


def _labels(texts: list[str], num_clusters: int, embed: Path | None, seed: int) -> NDArray[np.int64]:
    from sklearn.cluster import KMeans
    from sklearn.feature_extraction.text import TfidfVectorizer

    features: Any
    if embed is None:
        try:
            features = TfidfVectorizer(max_features=_FEATURES, sublinear_tf=True).fit_transform(texts)
        except ValueError:
            raise UserError("no document has a word of two letters, so none is like another; give text") from None
    else:
        if not any((embed / name).is_file() for name in ("modules.json", "config.json")):  # else it would be downloaded
            raise UserError(f"--embed {embed} holds no sentence-transformers model (no modules.json); give its folder")
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise UserError(
                f"--embed {embed} needs the library sentence-transformers, which is not installed; install it, or "
                "leave --embed out for TF-IDF"
            ) from None
        features = SentenceTransformer(str(embed), device="cpu").encode(texts, show_progress_bar=False)
    label_N: NDArray[np.int64] = KMeans(num_clusters, n_init=1, random_state=seed).fit_predict(features)
    return label_N.astype(np.int64)


def _line(document: Document) -> str:
    return json.dumps({"content": document.text, "id": document.number, "file": document.file}) + "\n"
