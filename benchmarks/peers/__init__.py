"""Services that others' documentation would have one write for the same ensemble, to be measured beside ours."""
