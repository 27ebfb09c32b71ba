"""What several commands share: their arguments, the opened session, measures and figures."""
