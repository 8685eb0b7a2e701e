"""What two scripts must do identically, one module a subject."""
