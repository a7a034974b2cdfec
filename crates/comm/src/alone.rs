//! One rank by itself.

use super::{Communicator, Error, Received, Sent};

/// The only rank of a job: there is nobody to exchange anything with.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alone;

const NOBODY: &str = "there is no other rank";

impl Communicator for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn host(&self) -> &'static str {
        "this machine"
    }

    fn engine(&self) -> String {
        "none".to_owned()
    }

    fn exchange(&self, _: Option<Sent<'_>>, _: Option<Received<'_>>) -> Result<(), Error> {
        Err(Error::Failed(NOBODY.to_owned()))
    }

    fn send(&self, _: usize, _: Vec<u8>) -> Result<(), Error> {
        Err(Error::Failed(NOBODY.to_owned()))
    }

    fn receive(&self, _: usize, _: &mut [u8]) -> Result<(), Error> {
        Err(Error::Failed(NOBODY.to_owned()))
    }

    fn flush(&self) -> Result<(), Error> {
        Ok(())
    }

    fn abort(&self, code: i32) -> ! {
        std::process::exit(code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_rank_gathers_itself() {
        let alone = Alone;
        assert_eq!(alone.all_gather(b"ab").unwrap(), [b"ab"]);
        let mut bytes = b"c".to_vec();
        alone.broadcast(0, &mut bytes).unwrap();
        assert_eq!(bytes, b"c");
        let mut own = [0; 2];
        alone.all_to_all(&[b"xy"], &mut [&mut own]).unwrap();
        assert_eq!(&own, b"xy");
        alone.barrier().unwrap();
        assert!(alone.receive(0, &mut [0]).is_err());
    }
}
