"""Files of the viewer Rerun, read back with its own reader."""

from rerun.chunk import RrdReader


def rows(path, entity):
    """The rows of an entity, by time: (frame, seconds, value); None: an empty one, which ends a line."""
    found = []
    for chunk in RrdReader(str(path)).stream():
        if chunk.entity_path == entity and not chunk.is_static:
            batch = chunk.to_record_batch()
            (name,) = (
                name for name in batch.schema.names if name.split(":")[-1] in ("scalars", "blob", "buffer", "text")
            )
            seconds = [time / 1e9 for time in batch.column("time").cast("int64").to_pylist()]
            first = [value[0] if value else None for value in batch.column(name).to_pylist()]
            found += zip(batch.column("frame").to_pylist(), seconds, first, strict=True)
    return sorted(found, key=lambda row: row[1])


def values(path, entity):
    return [value for _, _, value in rows(path, entity)]


def entities(path):
    return {chunk.entity_path for chunk in RrdReader(str(path)).stream()}
