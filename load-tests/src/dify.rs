//! A simulated Dify app.
