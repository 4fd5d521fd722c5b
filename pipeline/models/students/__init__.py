"""Students: new, continued from a model, or begun with some of a teacher's layers."""
