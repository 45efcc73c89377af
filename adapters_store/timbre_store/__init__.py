"""An adapter at rest: blobs, manifests, names and versions, and the checks of what strangers upload.

    store.Store               the one writer: uploads, names, versions, aliases
    reader.open_adapter       reads by digest from any process, without the database
    inspection.Inspect        what the store asks about a method; the builder of the server hands it in
    errors                    everything that can be refused or go wrong

Knows no method, no model and no server, and never imports torch. The format on disk, its promises and its
crash table are in `FORMAT.md`. Nothing is imported here, so that a reader does not pay for the database.
"""
