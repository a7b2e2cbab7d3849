"""The model one block at a time: forward, backward and training passes that read weights from a
source."""
