//! A cluster that is started for the run, and the drafter's model alone, to be asked the same.

use std::net::{Ipv4Addr, SocketAddr};

use clap::Parser;
use headstart_router::OnNoDrafter;
use headstart_service::options::BasePromptChoice;

use super::{Against, ServeArgs};
use crate::failure::Failure;
use crate::up::{Cluster, UpOptions};

/// One or two clusters in this process.
pub(super) struct Local {
    cluster: Cluster,
    alone: Option<Cluster>,
}

impl Local {
    /// Starts what `args` ask for; `None` if that is nothing.
    ///
    /// # Errors
    /// When a model cannot be had or a cluster cannot start.
    pub(super) async fn start(args: &ServeArgs) -> Result<Option<Self>, Failure> {
        let (Some(drafter), Some(base)) = (&args.drafter, &args.base) else { return Ok(None) };
        let required = ["headstart up", "--drafter", "smollm2", "--base", "smollm2"];
        let mut options = UpOptions::try_parse_from(required)
            .map_err(|error| Failure::Usage(error.to_string()))?;
        let any_port = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        (options.drafter, options.base) = (drafter.clone(), base.clone());
        (options.http, options.grpc) = (any_port, any_port);
        (options.dtype, options.threads) = (args.dtype, args.threads);
        options.slots = options.slots.max(args.concurrency);
        let cluster = Cluster::start(&options).await?;
        let alone = match args.against {
            None => None,
            Some(Against::DrafterAlone) => {
                // The same model, prompt and router, and nobody to hand over to.
                options.base = drafter.clone();
                options.base_prompt = BasePromptChoice::Chat;
                options.drafters = 0;
                options.router.on_no_drafter = OnNoDrafter::BaseOnly;
                Some(Cluster::start(&options).await?)
            }
        };
        Ok(Some(Self { cluster, alone }))
    }

    /// Where the cluster serves HTTP.
    pub(super) fn address(&self) -> String {
        self.cluster.http().to_string()
    }

    /// Where the drafter alone does.
    pub(super) fn alone(&self) -> Option<String> {
        self.alone.as_ref().map(|cluster| cluster.http().to_string())
    }

    /// What runs, for people.
    pub(super) fn name(&self) -> String {
        let [drafter, base] = self.cluster.specs();
        format!("a cluster of {drafter} and {base}")
    }

    /// Stops everything.
    ///
    /// # Errors
    /// When a part failed while it drained.
    pub(super) async fn stop(self) -> Result<(), Failure> {
        let stopped = self.cluster.stop().await;
        match self.alone {
            Some(alone) => stopped.and(alone.stop().await),
            None => stopped,
        }
    }
}
