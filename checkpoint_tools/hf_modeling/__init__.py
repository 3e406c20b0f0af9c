"""The files that travel beside an exported model; they stand alone and import nothing of the engine."""
