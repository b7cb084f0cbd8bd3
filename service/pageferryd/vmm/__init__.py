"""One driver a kind of VMM, behind one small interface."""
